"""The service that hosts the target model: `duet-cloud`."""
