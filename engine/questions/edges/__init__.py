"""The computational graph: edges between heads, MLPs, embedding and logits; estimated, run, kept in circuits."""
