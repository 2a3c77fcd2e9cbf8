"""Tasks other than predicting the next token: classification, embeddings, reranking."""
