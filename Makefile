PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu coverage lint compare compare-demo reproduce-demo clean

# NoCo as published beside its closed form: one table, and a page to look at.
demo: $(VENV)/demo.done
	$(BIN)/python sweep.py --datasets demo --methods noco noco_cf --name demo
	$(BIN)/python -m figures.compare $$(cat results/sweep-demo/runs.txt) --out results/demo/compared
	$(BIN)/python -m figures.report $$(cat results/sweep-demo/runs.txt) --out results/demo/report.html

# make compare DATA="my_parts my_tiles" SETS="mvtec=/data/mvtec" SEEDS="0 1 2" BUDGET=minutes
SEEDS ?= 0
BUDGET ?= presets
compare: $(VENV)/demo.done
	$(BIN)/python -m benchmarks.comparison $(if $(DATA),--data-root $(DATA)) \
		$(if $(SETS),--data-sets $(SETS)) --seeds $(SEEDS) --budget $(BUDGET)

compare-demo: $(VENV)/demo.done
	$(BIN)/python -m benchmarks.comparison --data-sets demo digits --budget short --jobs 2 \
		--output results/compare-demo

# Nothing of it asks for a CUDA device, be there one, a broken one or none.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

test-gpu: $(VENV)/test.done
	$(BIN)/python -m pytest -m gpu

coverage: $(VENV)/test.done
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu" --cov --cov-report=term:skip-covered

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

# The papers' tables and figures in small, on embedded data: REPRODUCE.md says what stands for what.
# Fewer epochs than SimpleNet's 160, so that all of it takes minutes.
DEMO := results/reproduce-demo
MAIN := $(DEMO)/main
NORM := $(DEMO)/norm
SIGMA := $(DEMO)/sigma
PATCH := $(DEMO)/patch
ROWS := $(DEMO)/rows
WATCHED := $(DEMO)/watched
OUT := $(DEMO)/figures
SHORT := --method.epochs 10
SIMPLENET := demo simplenet $(SHORT)
SWEEP := $(BIN)/python sweep.py --seeds 0 1 2 --jobs 2
FIGURE := $(BIN)/python -m figures

reproduce-demo: $(VENV)/demo.done
	$(SWEEP) --output $(MAIN) --datasets demo digits --methods noco noco_exact noco_cf knn mahalanobis \
		--set "demo padim --method.dims 50" "demo patchcore --method.coreset-ratio 0.01" \
		"$(SIMPLENET)" "demo nc_disc $(SHORT)" "digits simplenet" "digits nc_disc" -- --overlays 0
	$(SWEEP) --output $(NORM) --datasets demo digits --methods noco noco_exact \
		--options method.norm=0.25,8,32 -- --overlays 0
	$(SWEEP) --output $(SIGMA) --datasets demo --methods simplenet nc_disc \
		--options method.sigma=0.005,0.05,0.15 -- --overlays 0 $(SHORT)
	$(SWEEP) --output $(PATCH) --datasets demo --methods simplenet \
		--options patch_size=1,5 -- --overlays 0 $(SHORT)
	$(SWEEP) --output $(ROWS) \
		--set "$(SIMPLENET) --layers 1" "$(SIMPLENET) --layers 2" "$(SIMPLENET) --layers 3" \
		"$(SIMPLENET) --layers 1 2" "$(SIMPLENET) --layers 1 2 3" \
		"$(SIMPLENET) --method.adaptor none" "$(SIMPLENET) --method.adaptor mlp" \
		"$(SIMPLENET) --method.loss cross_entropy" -- --overlays 0
	$(BIN)/python train_mvtec.py $(SIMPLENET) --monitor-test --output $(WATCHED)
	$(BIN)/python train_mvtec.py demo nc_disc $(SHORT) --monitor-test --output $(WATCHED)
	$(BIN)/python train_mvtec.py demo noco_cf --save-maps --output $(WATCHED)
	$(FIGURE).table2 $(MAIN)/demo-*/* $(MAIN)/digits-*/* --out $(OUT)/noco_table2
	$(FIGURE).table3 $(MAIN)/demo-*/* --out $(OUT)/noco_table3
	$(FIGURE).figure1 $(MAIN)/demo-*/* $(MAIN)/digits-*/* --out $(OUT)/noco_figure1
	$(FIGURE).figure3 $(MAIN)/demo-noco/* $(NORM)/demo-noco/* --category grass \
		--out $(OUT)/noco_figure3_grass
	$(FIGURE).figure3 $(MAIN)/digits-noco/* $(NORM)/digits-noco/* --category 3 \
		--out $(OUT)/noco_figure3_digit
	$(FIGURE).norm_sweep $(MAIN)/*-noco/* $(NORM)/*-noco/* $(MAIN)/*-noco_exact/* \
		$(NORM)/*-noco_exact/* --out $(OUT)/norm_sweep
	$(FIGURE).simplenet_tables $(MAIN)/demo-simplenet/* $(ROWS)/demo-simplenet/* \
		$(MAIN)/digits-simplenet/* --out $(OUT)/simplenet_table
	$(FIGURE).adaptor_std $(WATCHED)/demo-simplenet/* --out $(OUT)/simplenet_figure4
	$(FIGURE).sigma_sweep $(MAIN)/demo-simplenet/* $(SIGMA)/demo-simplenet/* \
		$(MAIN)/demo-nc_disc/* $(SIGMA)/demo-nc_disc/* --out $(OUT)/simplenet_figure5
	$(FIGURE).patch_size $(MAIN)/demo-simplenet/* $(PATCH)/demo-simplenet/* \
		--out $(OUT)/simplenet_figure6
	$(FIGURE).loss_curve $(WATCHED)/demo-simplenet/* $(WATCHED)/demo-nc_disc/* \
		--out $(OUT)/simplenet_figure7
	$(FIGURE).heatmaps $(WATCHED)/demo-noco_cf/* --by-defect --out $(OUT)/simplenet_figure8
	$(FIGURE).instability $(WATCHED)/demo-simplenet/* $(WATCHED)/demo-nc_disc/* \
		--out $(OUT)/instability
	$(FIGURE).selection_curve $(MAIN)/demo-noco_exact/* --out $(OUT)/selection_curve
	$(FIGURE).closed_form_proof --out $(OUT)/closed_form_proof
	$(FIGURE).compare $(MAIN)/demo-*/* --out $(OUT)/compare_demo
	$(FIGURE).compare $(MAIN)/digits-*/* --out $(OUT)/compare_digits
	$(FIGURE).report $(WATCHED)/demo-noco_cf/* --out $(OUT)/report.html

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/test.done: requirements.txt requirements-dev.txt requirements-ray.txt requirements-export.txt \
		requirements-saa.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
