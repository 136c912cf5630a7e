"""The engines that a target model runs on, behind one interface (`base.Target`)."""
