"""The vocabulary that operator, trainer and tools share: resource models, run snapshot, stage results, failure reasons.

Depends on pydantic only, so that every image, with or without torch, can import it.
"""

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
COMBINATION_KIND = "AdapterCombination"
COMBINATION_PLURAL = "adaptercombinations"
