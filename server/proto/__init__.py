"""The messages of the gRPC protocol: `inference.proto`, and what is made from it (`make proto`)."""
