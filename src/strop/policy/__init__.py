"""Loading, adapters, attention, log-probs, the policy, the reference. Floor 2."""

from strop.terminal import take_over

take_over("peft", "bitsandbytes", "accelerate")  # before they are imported: some speak of optional parts they miss
