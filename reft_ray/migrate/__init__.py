"""Move finetuning files and jobs from another provider to a service of ours."""
