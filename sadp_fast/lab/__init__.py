"""The laboratory: the command `sadp-fast`, networks, data sets, training, studies, reports. Imports the library."""
