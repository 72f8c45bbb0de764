"""The networks of guests: what their interfaces are connected to, outside of QEMU."""
