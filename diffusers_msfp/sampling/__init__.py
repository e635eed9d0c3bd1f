"""Stock pipelines as what is called: their calls, denoisers, timesteps, solvers and trajectories."""
