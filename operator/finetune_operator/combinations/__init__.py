"""AdapterCombinations: what FineTuneJobs share with them is theirs too, and the rest is here."""
