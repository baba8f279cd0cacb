"""Our kernels inside other people's libraries, a module each: `import llmfast.integrations.transformers`."""
