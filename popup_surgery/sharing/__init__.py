"""Share artifacts: their model cards, and repositories of them on the Hugging Face Hub."""
