"""How a policy trains: one loop (`loop`), what it is taught (`lesson`), and what takes the steps (`torch_learner`)."""
