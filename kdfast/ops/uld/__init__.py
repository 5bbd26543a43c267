"""Universal logit distillation: sorted probabilities of two vocabularies."""
