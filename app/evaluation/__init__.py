"""How well the service finds and answers, measured on an evaluation set and compared with an earlier run."""
