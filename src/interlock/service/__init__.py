"""The user's verbs: submit, cancel, describe, watch, and the keeping of images, volumes and tokens.

Every door (HTTP, dashboard, OpenStack's face) speaks to this package only. It checks what a caller may see and whether
the input makes sense; what is allowed in which state is the gate's, and nothing here repeats it.
"""
