"""What the operators share: the equations of a time step, memory layout, launching and tuning."""
