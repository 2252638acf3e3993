"""What a node holds for others: replicas of streams, in arenas of fixed pages under one byte budget."""
