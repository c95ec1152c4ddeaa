"""Random masks: what weights that are chosen by lot are worth, to compare with."""

from .edge_popup import EdgePopup


class RandomMask(EdgePopup):
    """w_eff = w · m, where m is 1 for k of a layer's weights, chosen by lot, and 0 elsewhere.

    The mask is that of edge-popup's first scores, drawn independently from the seed, so that each choice of `kept`
    weights is as probable as any other. The scores are never trained; running statistics of norms accumulate, and
    whatever else is told to train does.
    """

    trains = False
