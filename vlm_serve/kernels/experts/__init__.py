"""Mixtures of experts (arXiv 2101.03961): each token through the few MLPs that its router chose for it."""
