"""What commands share: options, tables, errors, requests."""
