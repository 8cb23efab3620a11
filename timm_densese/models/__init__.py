"""The plugin: what `import timm_densese` registers with timm."""
