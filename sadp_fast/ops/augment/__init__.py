"""Random crops, flips and normalisation of images on the device."""
