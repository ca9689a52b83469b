"""Baton on a Ray cluster: an actor for each node of Baton starts it as a child, and starts it again when it ends.

Ray places the actors and starts them again elsewhere when they or their machines die. No request passes through Ray:
the nodes find and lose one another as everywhere, and outlive their actors, so streams go on when Ray's head is gone.
"""
