"""What several tests share: builders, servers, small jobs, faults."""
