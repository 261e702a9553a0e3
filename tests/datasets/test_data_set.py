from datasets.data_set import SemanticSet, StructuredSet, find_data_sets, num_categories


def test_the_default_comes_first_and_each_set_has_the_name_of_its_file():
    structured, semantic = find_data_sets(StructuredSet), find_data_sets(SemanticSet)
    assert list(structured) == ["mvtec", "btad", "demo", "folder", "mpdd", "mvtec_loco", "visa"]
    of_colour = [name for name, one in semantic.items() if not one.is_grey]
    assert of_colour == ["cifar10", "cats_vs_dogs", "cifar100", "cifar100_coarse", "folder"]
    of_grey = [name for name, one in semantic.items() if one.is_grey]
    assert of_grey == ["digits", "fashion_mnist", "mnist"]
    assert all(one.name == name for name, one in [*structured.items(), *semantic.items()])


def test_a_rotated_digit_is_no_anomaly():
    semantic = find_data_sets(SemanticSet)
    assert {n for n, one in semantic.items() if not one.has_synthetic} == {"digits", "mnist"}


def test_numbers_of_categories():
    counts = {"mvtec": 15, "demo": 3, "mpdd": 6, "visa": 12, "folder": 0, "no such set": 0}
    counts |= {"cifar100": 100, "cifar100_coarse": 20, "cats_vs_dogs": 2}
    assert {name: num_categories(name) for name in counts} == counts
    groups = find_data_sets(StructuredSet)["mvtec"].groups
    assert {name: len(group) for name, group in groups.items()} == {
        "mean_textures": 5,
        "mean_objects": 10,
    }
