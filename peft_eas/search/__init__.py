"""The search for the MHAs to skip: in a loop of your own, and what it needs of Trainer."""
