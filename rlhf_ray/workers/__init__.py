"""The roles as plain classes, wrapped by Ray at launch: rollout, policy, value, reward, and the frozen scorer."""
