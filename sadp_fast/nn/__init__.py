"""Spiking neurons as modules, batch normalisation with a neuron behind it, surrogate gradients."""
