"""What a found subnetwork owes to its parts, and what conversion covers of each network."""
