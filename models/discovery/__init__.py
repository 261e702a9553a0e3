"""Networks that tell kinds of defects apart, and the pieces of images that they learn from.

Where the pieces come from (maps, masks, boxes) and how well the kinds agree with names is not here.
"""
