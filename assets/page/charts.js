// Live plots: routing share, agreement and time per token, as the text grows.
