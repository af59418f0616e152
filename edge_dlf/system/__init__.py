"""What every program needs of its machine: durable files, JSON lines, facts about this computer."""
