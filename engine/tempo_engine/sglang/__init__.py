"""SGLang servers as the policy's sampler: started and watched, fed with weights, asked for rollouts.

Only `cpu` is ever imported by a server; everything else runs in the trainer and speaks HTTP.
"""

VERSION = "0.5.23"  # of sglang: endpoints, payloads and extension points are those of this release
