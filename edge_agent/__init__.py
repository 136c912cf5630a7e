"""The edge: routes a prompt, drafts or answers with a small model, talks to the cloud."""
