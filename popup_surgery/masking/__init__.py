"""What `convert` does to a network, and the way back.

Which weights are masked, how a masked layer works, and what becomes of all other parameters.
"""
