"""The wire: duet.v1 protobuf messages (stubs are made by the build) and their translation."""
