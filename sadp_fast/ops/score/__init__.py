"""A batch's scores, written into their slots, and reductions over tensors that no neuron knows."""
