"""Ground floor: contracts that several rooms share: ParallelDims, Plan, Batch, the counter generator, the registry."""
