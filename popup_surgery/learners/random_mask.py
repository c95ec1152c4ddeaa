"""Random masks, as a baseline: weights chosen at random."""

from .edge_popup import EdgePopup


class RandomMask(EdgePopup):
    """w_eff = w · m, where m is 1 for a share k of a layer's weights, chosen at random, and 0 elsewhere.

    The mask is the one of edge-popup's first scores. They are drawn independently from the seed, so each choice of
    `kept` weights is equally probable. The scores are never trained. Running statistics of norms accumulate, and other
    parameters are trained if they are set to train.
    """

    trains = False
