from datasets.sets.cifar100_coarse import FINE_OF_COARSE, coarse_numbers

# Superclass of the fine classes 0 to 99 as the data set's own files number them, written down
# apart from the table of names: apple (0) is among fruit and vegetables (4), and so on.
COARSE_OF_FINE = """
 4  1 14  8  0  6  7  7 18  3   3 14  9 18  7 11  3  9  7 11   6 11  5 10  7  6 13 15  3 15
 0 11  1 10 12 14 16  9 11  5   5 19  8  8 15 13 14 17 18 10  16  4 17  4  2  0 17  4 18 17
10  3  2 12 12 16 12  1  9 19   2 10  0  1 16 12  9 13 15 13  16 19  2  4  6 19  5  5  8 19
18  1  2 15  6  0 17  8 14 13
"""


def test_coarse_map_agrees_with_the_numbers_of_the_official_files():
    # The official numbers, fine and coarse, follow the alphabet.
    fine = tuple(sorted({name for group in FINE_OF_COARSE.values() for name in group}))
    assert list(FINE_OF_COARSE) == sorted(FINE_OF_COARSE)
    assert coarse_numbers(fine) == tuple(int(number) for number in COARSE_OF_FINE.split())
