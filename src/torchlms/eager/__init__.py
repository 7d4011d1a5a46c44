"""The doing, eager: watch ops, hold saved values, carry out a plan, survive without one."""
