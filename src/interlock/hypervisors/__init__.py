"""What holds guests: QEMU for real, and a simulation of it; and the files that guests are made of."""
