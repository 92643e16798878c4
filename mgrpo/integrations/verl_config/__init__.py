"""verl's configuration for M-GRPO: `--config-path pkg://mgrpo.integrations.verl_config --config-name mgrpo`."""
