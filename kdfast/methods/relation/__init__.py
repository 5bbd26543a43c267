"""Losses of how the samples of a batch lie to each other, in each model's own space."""

from kdfast.methods.relation.cc import CC
from kdfast.methods.relation.crd import CRD
from kdfast.methods.relation.features import Relation
from kdfast.methods.relation.pkt import PKT
from kdfast.methods.relation.rkd import RKD
from kdfast.methods.relation.sp import SP

__all__ = ["CC", "CRD", "PKT", "RKD", "SP", "Relation"]
