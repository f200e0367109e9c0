"""Pure decisions: values in, values out. Nothing here opens, sleeps, reads a clock or imports vllm."""
