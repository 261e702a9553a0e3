"""CIFAR-100 by its 20 superclasses (Krizhevsky 2009, table on the data set's page)."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.data_set import SemanticSet
from datasets.sets import cifar100
from datasets.tasks.labelled import LabelledSet

FINE_OF_COARSE: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}


def coarse_numbers(fine_names: tuple[str, ...]) -> tuple[int, ...]:
    """The number of the superclass, 0 to 19, of each fine class.

    Raises:
        KeyError: A name is none of the 100 fine classes.
    """
    number_of_fine = {
        fine: number
        for number, fine_classes in enumerate(FINE_OF_COARSE.values())
        for fine in fine_classes
    }
    return tuple(number_of_fine[name] for name in fine_names)


def read(root: Path) -> LabelledSet:
    """Reads CIFAR-100 with the superclass of each image for its class."""
    fine = cifar100.read(root)
    numbers = np.array(coarse_numbers(fine.class_names), dtype=np.int64)  # (100,)
    return LabelledSet(
        name="cifar100_coarse",
        class_names=tuple(FINE_OF_COARSE),
        train=replace(fine.train, labels=numbers[fine.train.labels]),
        test=replace(fine.test, labels=numbers[fine.test.labels]),
    )


DATA_SET = SemanticSet(read=read, num_categories=20, experiment=cifar100.DATA_SET.experiment)
