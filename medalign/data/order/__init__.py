"""Which sample comes when: a function of the settings, the seed and the position."""
