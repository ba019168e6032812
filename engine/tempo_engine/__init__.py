"""The training engine: policy, critic, rollouts, packing, updates, checkpoints, evaluation. It knows nothing of EM or recipes."""
