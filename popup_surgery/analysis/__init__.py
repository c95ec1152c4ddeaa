"""What each part of a subnetwork contributes, and how much of each network conversion covers."""
