"""The command `python -m figures.report RUN`; see `figures.report.page`."""

from figures.report.page import main

if __name__ == "__main__":
    main()
