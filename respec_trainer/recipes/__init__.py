"""How the models that a run starts from are made: the small actor of the quickstart, and a drafter for any actor."""
